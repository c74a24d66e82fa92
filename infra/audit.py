"""Known vulnerabilities of the installed packages, by pip-audit. Says so, and passes, where its service cannot be asked."""

import importlib.util
import json
import subprocess
import sys

COMMAND = ("-m", "pip_audit", "--local", "--skip-editable", "--progress-spinner", "off", "--timeout", "5", "--format", "json")
UNREACHED = ("Could not connect to", "not redirecting properly", "ConnectionError")
"""What pip-audit says last of a service that does not answer; it ends with 1 then, as for a vulnerability."""


def main() -> int:
    """Exit code: 1 for a vulnerability or a failure of pip-audit, 0 otherwise."""
    if importlib.util.find_spec("pip_audit") is None:
        print("audit skipped: pip-audit is not installed (pip install '.[dev]')")
        return 0
    done = subprocess.run([sys.executable, *COMMAND], capture_output=True, text=True)
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except ValueError:
        if any(words in done.stderr for words in UNREACHED):
            print("audit skipped: the service that pip-audit asks does not answer from here")
            return 0
        print(done.stderr, file=sys.stderr, end="")
        return 1
    known = [package for package in packages if "vulns" in package]
    if not known:  # a mirror that has packages and no advisories answers so, and pip-audit calls that clean
        print("audit skipped: the service that pip-audit asks knows none of the installed packages")
        return 0
    bad = [package for package in known if package["vulns"]]
    for package in bad:
        ids = ", ".join(found["id"] for found in package["vulns"])
        print(f"{package['name']} {package['version']}: {ids}")
    unknown = len(packages) - len(known)
    print(f"audit: {len(bad)} of {len(known)} packages have known vulnerabilities, {unknown} could not be asked for")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
