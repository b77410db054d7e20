"""Print the newest versions, and which of them are not among the tested ones yet; never fails."""

from importlib.metadata import version

from cggr_train.tested_versions import TESTED, verdict

for package in TESTED:
    found = version(package)
    judged = verdict(package, found)
    print(f"{package} {found}: {judged}" + ("" if judged == "tested" else "; it passed: update tested_versions.py"))
