"""Compare the installed packages with the database of known vulnerabilities, by pip-audit.

    python scripts/audit.py

Exit code 1: one is known; 2: the database could not be asked about some packages.
"""

import json
import subprocess
import sys
import sysconfig


def main() -> int:
    """Audit this environment and print what was found."""
    uv = [sys.executable, "-m", "uv", "tool", "run", "pip-audit", "--progress-spinner", "off", "--format", "json"]
    done = subprocess.run([*uv, "--path", sysconfig.get_path("purelib")], capture_output=True, text=True)
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        print(f"pip-audit failed: {(done.stderr.strip().splitlines() or ['no output'])[-1]}", file=sys.stderr)
        return 2
    found = [(p["name"], p["version"], weakness) for p in packages for weakness in p.get("vulns", ())]
    for name, version, weakness in found:
        print(
            f"{name} {version}: {weakness['id']}, mended in {', '.join(weakness['fix_versions']) or 'no version yet'}"
        )
    ours = "rotssl"
    unknown = [p["name"] for p in packages if "skip_reason" in p and p["name"] != ours]
    audited = sum("skip_reason" not in p for p in packages)
    print(f"{audited} of {len(packages)} packages audited, {len(found)} known vulnerabilities")
    if unknown:
        some = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        print(f"not audited, because the database did not know them or could not be reached: {some}")
    return 1 if found else 2 if unknown else 0


if __name__ == "__main__":
    sys.exit(main())
