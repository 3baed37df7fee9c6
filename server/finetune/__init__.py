"""Training files, data sets, jobs and evaluations. API process."""
