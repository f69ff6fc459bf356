"""The routes, by whose API they speak. Each file has ``ROUTES``: method and path to handler."""
