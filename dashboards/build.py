"""`python -m dashboards.build`: writes the dashboards as JSON into `dashboards/json/`, for Grafana's provisioning."""

from __future__ import annotations

from pathlib import Path

from dashboards.model import Page
from dashboards.pages import bus, jobs, packing, pools, tenants, trainers
from dashboards.render import rendered

PAGES: tuple[Page, ...] = (packing.PAGE, jobs.PAGE, pools.PAGE, trainers.PAGE, bus.PAGE, tenants.PAGE)
JSON = Path(__file__).parent / "json"


def files() -> dict[Path, str]:
    """What is to be committed, by path."""
    return {JSON / f"{page.uid}.json": rendered(page) for page in PAGES}


def main() -> None:
    """Write what is missing or different, and remove what is no page any more."""
    wanted = files()
    for path in set(JSON.glob("*.json")) - wanted.keys():
        path.unlink()
    for path, text in wanted.items():
        path.write_text(text)


if __name__ == "__main__":
    main()
