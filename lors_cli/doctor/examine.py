"""`lors doctor`: what the machine has, what is missing, and what to do about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from lors_cli.doctor import checkups, devices
from lors_cli.doctor.checkups import Finding
from lors_cli.output import console, progress

CHECKUPS: dict[str, Callable[[], Iterator[Finding]]] = {
    "packages": checkups.packages,
    "devices": devices.devices,
    "memory": checkups.memory,
    "disk": checkups.disk,
    "hub": checkups.hub,
    "data": checkups.data,
    "fast paths": devices.fast_paths,
}
STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def examine() -> list[Finding]:
    """Look at everything; nothing is changed and no secret is read out.

    Returns:
        The findings, group by group. A group that could not be looked at is one finding that says why.
    """
    found: list[Finding] = []
    for group, checkup in CHECKUPS.items():
        with progress.busy(f"looking at {group}"):
            try:
                found += checkup()
            except Exception as error:  # a checkup must not end the check-up
                why, advice = f"{type(error).__name__}: {error}", "Please report this."
                if isinstance(error, ImportError):
                    why, advice = f"the package {error.name} is missing or broken", "See packages, above."
                found.append(Finding(group, group, "warn", f"not known: {why}", advice))
    return found


def document(findings: list[Finding]) -> dict[str, Any]:
    """The JSON document: `ok` is false when lors cannot work."""
    from dataclasses import asdict

    return {"ok": not any_failed(findings), "checks": [asdict(finding) for finding in findings]}


def any_failed(findings: list[Finding]) -> bool:
    """Whether lors cannot work here."""
    return any(finding.status == "fail" for finding in findings)


def show(findings: list[Finding]) -> None:
    """A line a finding, with what to do below it; with -q only what is missing."""
    group = None
    for finding in findings:
        if finding.status == "ok" and console.verbosity() < 0:
            continue
        if finding.group != group:
            console.result(f"\n{finding.group}" if group else finding.group)
            group = finding.group
        console.check(finding.status, STYLES[finding.status], finding.name, finding.text, finding.advice)
    counts = Counter(finding.status for finding in findings)
    if counts["fail"]:
        console.result(f"\n{counts['fail']} to repair before lors can work here, {counts['warn']} warnings.")
    elif counts["warn"]:
        console.result(f"\nlors works here; {counts['warn']} warning{'s' if counts['warn'] > 1 else ''}.")
    else:
        console.result("\nlors works here.")
