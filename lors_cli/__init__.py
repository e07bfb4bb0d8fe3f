"""Prune, tune and evaluate sparse language models."""

from importlib import import_module as _import_module

from lors_cli.machine.imports import when_imported as _when_imported

__version__ = "0.1.0"

_when_imported("transformers.quantizers", lambda: _import_module("lors_cli.models.packed.quantizer"))
