-- name: paused
select c.paused from herd_sweeper.control c

-- name: set_paused
update herd_sweeper.control set paused = %(paused)s

-- name: policies
-- Those to be swept, with their batch sizes.
select p.relation, p.batch_size from herd_sweeper.policy p where p.enabled order by p.relation

-- name: sweep
select herd_sweeper.sweep(%(relation)s, %(epoch)s, %(start)s)

-- name: schema_exists
select exists (select from pg_namespace where nspname = 'herd_sweeper')

-- name: install_lock
-- One installation at a time in one database.
select pg_advisory_xact_lock(7522818962049459814)
