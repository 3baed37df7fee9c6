"""HTTP: the application, middleware, limits, bodies, responses, and the routes."""
