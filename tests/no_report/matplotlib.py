"""In the way of matplotlib for what tests start, which then ends without drawing a report."""

raise ImportError("tests start nucsam without its extra `report`")
