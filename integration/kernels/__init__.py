"""The kernel suites on other kernels: fetch them, boot them, write docs/kernels.md. ``make kernels`` runs it all."""
