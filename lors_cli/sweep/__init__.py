"""Sweeps: one recipe over a grid of settings, stages that cells share done once.

`reading` and `cells` turn a sweep's file into checked recipes, `stages` says what each needs and where it lies,
`costs` what it will take, `running` does it. Layout of a sweep's folder: docs/sweeps.md.
"""

from __future__ import annotations
