"""What tests share: servers, clients, logs and supervisors that they start."""
