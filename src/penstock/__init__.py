"""penstock serves runs as resumable, cancellable Server-Sent-Event streams, on Trio."""
