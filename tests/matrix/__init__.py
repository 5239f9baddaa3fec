"""Runs on other CPUs (`matrix.cpus`) and with other versions of what we depend on."""
