"""Questions about one series: readings, rollups, charts."""
