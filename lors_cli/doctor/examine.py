"""`lors doctor`: what the machine has, what is missing, and what to do about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
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


def examine() -> dict[str, list[Finding]]:
    """Look at everything, group by group; nothing is changed and no secret is read out.

    What could not be looked at in a group is a finding that says why.
    """
    found: dict[str, list[Finding]] = {group: [] for group in CHECKUPS}
    for group, checkup in CHECKUPS.items():
        with progress.busy(f"looking at {group}"):
            try:
                found[group].extend(checkup())
            except Exception as error:  # a checkup must not end the check-up
                why, advice = f"{type(error).__name__}: {error}", "Please report this."
                if isinstance(error, ImportError):
                    why, advice = f"the package {error.name} is missing or broken", "See packages, above."
                found[group].append(Finding(group, "warn", f"not known: {why}", advice))
    return found


def document(findings: dict[str, list[Finding]]) -> dict[str, Any]:
    """The JSON document: `ok` is false when lors cannot work."""
    checks = [{"group": group, **asdict(finding)} for group, found in findings.items() for finding in found]
    return {"ok": all(check["status"] != "fail" for check in checks), "checks": checks}


def show(findings: dict[str, list[Finding]]) -> None:
    """A line a finding, with what to do below it; with -q only what is missing."""
    quiet = console.verbosity() < 0
    shown = {group: [finding for finding in found if not quiet or finding.status != "ok"]
             for group, found in findings.items()}  # fmt: skip
    for number, group in enumerate(name for name, found in shown.items() if found):
        console.result(f"\n{group}" if number else group)
        for finding in shown[group]:
            console.check(finding.status, STYLES[finding.status], finding.name, finding.text, finding.advice)
    counts = Counter(finding.status for found in findings.values() for finding in found)
    if counts["fail"]:
        console.result(f"\n{counts['fail']} to repair before lors can work here, {counts['warn']} warnings.")
    elif counts["warn"]:
        console.result(f"\nlors works here; {counts['warn']} warning{'s' if counts['warn'] > 1 else ''}.")
    else:
        console.result("\nlors works here.")
