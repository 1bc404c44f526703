"""One page about runs that opens anywhere: its library, numbers and texts are in it."""

from collections.abc import Sequence
from importlib import resources

from sedd_megatron.errors import UserError
from sedd_megatron.output_files import script_json
from sedd_megatron.reporting.curves import CHARTS, chart_data
from sedd_megatron.reporting.records import RunRecords
from sedd_megatron.wording import how_to_install

TEMPLATE = "report.html"
LIBRARY_PLACEHOLDER, DATA_PLACEHOLDER = "__PLOTLY__", "__REPORT_DATA__"


def report_page(runs: Sequence[RunRecords]) -> str:
    """The page's HTML.

    Raises:
        UserError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise UserError(f"a report needs plotly; {how_to_install('report')}") from error
    charts = [chart_data(chart, runs) for chart in CHARTS]
    data = {
        "runs": [
            {
                "name": run.name,
                "restarts": run.restarts,
                "skipped": len(run.skipped),
                "samples": run.samples,
                "faults": run.faults,
                **_summary(run),
            }
            for run in runs
        ],
        "charts": [chart for chart in charts if chart is not None],
    }
    template = resources.files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8")
    return template.replace(LIBRARY_PLACEHOLDER, get_plotlyjs()).replace(DATA_PLACEHOLDER, script_json(data))


def _summary(run: RunRecords) -> dict[str, float | int | None]:
    def last(field: str) -> float | None:
        return float(run.fields[field].values[-1]) if field in run.fields else None

    validation = run.fields.get("validation_loss")
    return {
        "iteration": int(max(series.iterations[-1] for series in run.fields.values())),
        "loss": last("loss"),
        "validation": last("validation_loss"),
        "best": None if validation is None else float(validation.values.min()),
        "samplesSeen": last("consumed_samples"),
    }
