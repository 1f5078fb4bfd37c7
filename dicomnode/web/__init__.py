"""The HTTP port: health, readiness, metrics and the status API; the dashboard comes later."""
