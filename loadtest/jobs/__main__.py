"""Runs a mesh with the autoscaler, gives it some jobs, then more, and draws what Prometheus saw of it.

    python -m loadtest.jobs --model smollm2-135m-instruct --jobs 1,3 --out DIR

The mesh is what `openrl up --autoscale` starts, with the models that are registered in the data directory. Each number
in `--jobs` is a phase: so many jobs are submitted at once, and the next phase begins when all have ended. At the end it
waits until load has been gone for a while, so that the way down is in the picture too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from loadtest.jobs.plots import draw
from loadtest.jobs.series import SERIES, Phase, fetch, summary

OPENRL = (sys.executable, "-m", "services.local")
POLL_SECONDS = 2.0
OPEN = ("pending", "running", "paused")


def main() -> None:
    """See the module's docstring."""
    arguments = _arguments()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    ports = ["--port", "0", "--prometheus-port", "0"]
    _openrl(arguments.data, "up", "--autoscale", "--detach", *ports, "--device", arguments.device)
    try:
        url = _prometheus(arguments.data)
        started = time.time()
        phases = [_phase(arguments, number) for number in arguments.jobs]
        time.sleep(arguments.after)
        found = {series.name: fetch(url, series, started, time.time()) for series in SERIES}
    finally:
        _openrl(arguments.data, "down")
    result = {"phases": [vars(phase) for phase in phases], "series": found, "summary": summary(phases, found)}
    (out / "jobs.json").write_text(json.dumps(result))
    draw(found, phases, out / "jobs.png")
    print(json.dumps(result["summary"], indent=2))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtest.jobs", description=__doc__)
    parser.add_argument("--data", type=Path, default=Path(".openrl"), help="data directory of the mesh")
    parser.add_argument("--model", required=True, help="a registered model")
    parser.add_argument("--spec", type=Path, default=Path("examples/demo.json"), help="the job")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps of each job")
    parser.add_argument("--jobs", type=lambda text: [int(part) for part in text.split(",")], default=[1, 3])
    parser.add_argument("--after", type=float, default=240.0, help="seconds to go on watching after the last job")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, required=True, help="directory for jobs.json and jobs.png")
    return parser.parse_args()


def _phase(arguments: argparse.Namespace, number: int) -> Phase:
    """Run so many jobs at the same time."""
    spec = json.loads(arguments.spec.read_text()) | {"base_model": arguments.model}
    spec["algorithm"]["steps"] = arguments.steps
    spec["evaluation"] = {"tasks": 64, "every": 0}
    begin = time.time()
    for seed in range(number):
        path = arguments.out / f"job-{number}-{seed}.json"
        path.write_text(json.dumps(spec | {"name": f"of-{number}", "seed": seed}))
        _openrl(arguments.data, "submit", str(path))
    while any(job["phase"] in OPEN for job in _jobs(arguments.data)):
        time.sleep(POLL_SECONDS)
    failed = [f"{job['job']}: {job['reason']}" for job in _jobs(arguments.data) if job["phase"] == "failed"]
    if failed:
        raise SystemExit(f"jobs failed: {failed}")
    print(f"{number} jobs of {arguments.steps} steps: {time.time() - begin:.0f} s", flush=True)
    return Phase(jobs=number, begin=begin, end=time.time())


def _jobs(data: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(_openrl(data, "jobs", "--json"))
    return found


def _prometheus(data: Path) -> str:
    for service in json.loads(_openrl(data, "status", "--json", check=False))["services"]:
        if service["service"] == "prometheus":
            return f"http://127.0.0.1:{service['port']}"
    raise SystemExit("Prometheus does not run")


def _openrl(data: Path, command: str, *arguments: str, check: bool = True) -> str:
    done = subprocess.run(
        [*OPENRL, command, *arguments, "--data", str(data)], check=False, capture_output=True, text=True
    )
    if check and done.returncode:
        raise SystemExit(f"openrl {command}: {done.stderr or done.stdout}")
    return done.stdout


if __name__ == "__main__":
    main()
