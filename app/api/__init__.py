"""HTTP: routes, parameters, responses and errors. The only package that imports FastAPI."""
