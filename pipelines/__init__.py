"""The JEPA pipeline on Ray: ingest, pretrain, sweep, post-train, plan, report.

Composes jepa_core (pure torch) with ray, PyAV, Delta Lake and object storage. Nothing here imports `cluster`.
"""
