"""Every Prometheus collector of the node, in one place: base units, bounded labels."""

from prometheus_client import Counter, Gauge, Histogram

instances_received = Counter(
    "dicomnode_instances_received_total",
    "C-STORE requests by calling peer and response status",
    ["peer", "status"],
)
bytes_received = Counter("dicomnode_received_bytes_total", "Bytes of stored instances")
instances_durable = Counter(
    "dicomnode_instances_durable_total",
    "Received instances by what made them durable: the redo log, or a sync of their own file",
    ["by"],
)
associations_rejected = Counter(
    "dicomnode_associations_rejected_total", "Associations rejected, by reason", ["reason"]
)
associations_open = Gauge("dicomnode_associations_open", "Associations open now")
series_completed = Counter(
    "dicomnode_series_completed_total", "Series found complete, by reason", ["reason"]
)
jobs_by_state = Gauge("dicomnode_jobs", "Jobs in the journal by state", ["state"])
deliveries_by_state = Gauge("dicomnode_deliveries", "Deliveries in the journal by state", ["state"])
commitments_by_state = Gauge(
    "dicomnode_commitments", "Storage commitments asked of us, by state", ["state"]
)
commitment_requests_by_state = Gauge(
    "dicomnode_commitment_requests",
    "Storage commitments of deliveries that we ask of destinations, by state",
    ["state"],
)
translation_seconds = Histogram(
    "dicomnode_translation_seconds",
    "From claimed job to derived series on disk",
    ["route"],
    buckets=(0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600, 1800),
)
series_unclassified = Counter(
    "dicomnode_series_unclassified_total",
    "Derived series without the report of their route's classifier",
    ["route"],
)
instances_delivered = Counter(
    "dicomnode_instances_delivered_total",
    "Derived instances answered by a destination, by outcome",
    ["destination", "outcome"],
)
batches_halved = Counter(
    "dicomnode_batches_halved_total", "Batches halved because memory ran out", ["route"]
)
slices_ahead = Counter(
    "dicomnode_slices_ahead_total",
    "Slices of translated series that were inferred while the series still arrived",
    ["route"],
)
model_info = Gauge(
    "dicomnode_model_info",
    "1 per loaded model, with what runs it; its self-test has passed",
    ["model", "engine", "precision", "device"],
)
model_usable = Gauge(
    "dicomnode_model_usable",
    "1 per routed model that was loaded and passed its self-test, 0 per model that failed",
    ["model"],
)
worker_start = Gauge(
    "dicomnode_worker_start_seconds", "From the start of the worker to its models being loaded"
)
workers_lost = Counter("dicomnode_workers_lost_total", "Worker processes that died")
free_bytes = Gauge("dicomnode_data_free_bytes", "Free space where data_dir lies")
tls_refused = Counter(
    "dicomnode_tls_refused_total", "Connections refused in the TLS handshake, by reason", ["reason"]
)
tls_reloads = Counter(
    "dicomnode_tls_reloads_total", "Changed certificate files, by what was done", ["outcome"]
)
tls_certificate_expires = Gauge(
    "dicomnode_tls_certificate_expires_timestamp_seconds", "When our certificate expires"
)
