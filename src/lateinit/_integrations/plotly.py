"""plotly, which draws in the page of ``lateinit report``: its JavaScript is in its wheel."""

from __future__ import annotations

from lateinit.errors import OutputError


def plotly_js() -> str:
    """The text of plotly.js.

    Raises:
        OutputError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise OutputError(
            "the report is drawn by plotly, which is not installed: pip install 'lateinit[report]'"
        ) from error
    return str(get_plotlyjs())
