"""Modules of tests by their file: pytest imports each test file under a name of its own."""

import importlib.util
import sys


def load_module(path):
    spec = importlib.util.spec_from_file_location(f"of_{path.parent.name}_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
