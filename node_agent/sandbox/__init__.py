"""An embedded cluster on one machine: etcd and PostgreSQL from Python wheels, hosts as processes."""
