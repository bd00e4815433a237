"""What app/report.py puts on its page."""
