"""Steps from one version of the tables to the next, applied in order when a log is opened."""
