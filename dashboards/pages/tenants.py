"""Tenants: who uses what."""

from __future__ import annotations

from dashboards.model import RATE, Choice, Page, Query, Row, lines, quantiles, stacked

TENANT = 'tenant=~"$tenant"'
TRAINED = f"openrl_trainer_tokens_total{{{TENANT}}}"


def computed(what: str) -> str:
    """Tokens of prompts, or sampled ones."""
    return f'openrl_sampler_tenant_tokens_total{{what="{what}", {TENANT}}}'


PAGE = Page(
    uid="openrl-tenants",
    title="OpenRL / Tenants",
    description="Who uses what. For bills the stream USAGE is exact; here tenants beyond the first hundred are one.",
    choices=(Choice("tenant", "Tenant", "openrl_sampler_tenant_tokens_total", "tenant"),),
    rows=(
        Row(
            "Now",
            (
                stacked(
                    "Trained tokens",
                    "Through passes, in a second. Tenants share passes by weight.",
                    Query(f"sum by (tenant) (rate({TRAINED}[{RATE}]))", "{{tenant}}"),
                ),
                stacked(
                    "Sampled tokens",
                    "In a second.",
                    Query(
                        f"sum by (tenant) (rate({computed('sampled')}[{RATE}]))",
                        "{{tenant}}",
                    ),
                ),
                stacked(
                    "Prompt tokens",
                    "In a second.",
                    Query(
                        f"sum by (tenant) (rate({computed('prompt')}[{RATE}]))",
                        "{{tenant}}",
                    ),
                ),
            ),
        ),
        Row(
            "Gateway",
            (
                stacked(
                    "Requests",
                    "By status, in a second.",
                    Query(f"sum by (status) (rate(openrl_gateway_requests_total[{RATE}]))", "{{status}}"),
                    unit="cps",
                ),
                lines(
                    "Time of a request",
                    "By endpoint; polls include their wait.",
                    *quantiles("openrl_gateway_request_seconds", "endpoint"),
                    unit="s",
                ),
                lines(
                    "Submitted and not answered",
                    "Operations and requests for samples, by replica.",
                    Query("openrl_gateway_unanswered", "{{instance}}"),
                ),
                lines(
                    "Turned away",
                    "Since a tenant is at a limit of its own, in a second.",
                    Query(
                        f"sum by (tenant) (rate(openrl_gateway_refused_total{{{TENANT}}}[{RATE}]))",
                        "{{tenant}}",
                    ),
                    unit="cps",
                    width=24,
                ),
            ),
        ),
        Row(
            "In the time shown",
            (
                lines(
                    "Trained tokens",
                    "Sum over the time shown.",
                    Query(f"sum by (tenant) (increase({TRAINED}[$__range]))", "{{tenant}}"),
                    width=12,
                ),
                lines(
                    "Sampled and prompt tokens",
                    "Sum over the time shown.",
                    Query(
                        f"sum by (tenant, what) (increase(openrl_sampler_tenant_tokens_total{{{TENANT}}}[$__range]))",
                        "{{tenant}} {{what}}",
                    ),
                    width=12,
                ),
            ),
        ),
    ),
)
