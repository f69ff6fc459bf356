"""Alerts: rules, their tests, the dashboard and runbooks from one table."""
