"""``cggr demo``: four ways to spend the same seconds on the same model and text, and what came of it."""

from cggr_train.demo.compare import DemoSettings, run_demo

__all__ = ["DemoSettings", "run_demo"]
