"""The one place that schedules: leaves to chunks to bytes (`save`), and back (`restore`).

Plans are data. The pipeline knows no concrete type handler and no concrete backend, and it neither creates nor commits a
directory.
"""
