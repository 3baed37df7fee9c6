"""HTTP: the application, middleware, limits, bodies, answers, and the routes."""
