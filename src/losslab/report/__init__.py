"""The report: results of claims as one self-contained HTML page.

`write_report` renders results, and the claims still to come, to a page that needs no network: styles, scripts
and figures are inside. `publisher` makes the callback that `losslab.lecture.run` calls as claims finish; it
renders each claim once. `write_page` makes the page of a single instrument. The pages are in the templates
beside this file; how figures look and how numbers are written belongs to the lecture.
"""

from __future__ import annotations

from losslab.report.page import publisher, write_report
from losslab.report.standalone import write_page

__all__ = ["publisher", "write_page", "write_report"]
