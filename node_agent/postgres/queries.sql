-- Every statement that pgherd's Python code sends to PostgreSQL.  Loaded by node_agent/postgres/queries.py.

-- name: version
-- The version of schema herd; an error where there is none.
select herd.version()

-- name: raiser_setup
-- A raise takes no side effects from role or database defaults; a waiting statement gives up soon and is repeated.
select herd.version(),
       set_config('statement_timeout', %(attempt)s, false),
       set_config('lock_timeout', '0', false),
       set_config('default_transaction_isolation', 'read committed', false),
       set_config('default_transaction_read_only', 'off', false)

-- name: other_history
-- Whether the fence was last raised on another server or timeline, so that it may have forgotten a later raise.
select case when pg_is_in_recovery() then false else exists (
  select from herd.fences f
    where f.name = %(name)s
      and (f.timeline, f.system_identifier)
          is distinct from (herd.timeline(), (select c.system_identifier from pg_control_system() c))
) end

-- name: raise_intent
-- Step 1: from now on lower tokens are refused.
select herd.raise_intent(%(name)s, %(epoch)s, %(start)s, %(node)s, %(cluster)s)

-- name: raise_fence
-- Step 2: waits for open transactions of lower tokens.
select herd.raise_fence(%(name)s, %(epoch)s, %(start)s, %(node)s)

-- name: superseded
-- Sessions to be ended for a token: registered with a lower one, named like one (PGAPPNAME of plain commands, cut
-- at 63 bytes), or blocking the raiser.  Numbers are compared as numeric: anybody may call himself anything.
with blocking (pid) as (
  select unnest(pg_blocking_pids(%(raiser)s))
), named (pid, epoch, start) as (
  select a.pid, p.token[1]::numeric, p.token[2]::numeric
    from pg_stat_activity a
         cross join lateral (select regexp_match(a.application_name, '^herd:(\d{1,19})\.(\d{1,10}):')) as p (token)
   where p.token is not null
     and a.application_name = left(format('herd:%%s.%%s:%%s', p.token[1], p.token[2], %(name)s::text), 63)
     and (a.datid = (select d.oid from pg_database d where d.datname = current_database())
          or a.backend_type = 'walsender')
     and not exists (select from herd.fences f
                      where f.name <> %(name)s and f.epoch::numeric = p.token[1]::numeric
                        and f.start::numeric = p.token[2]::numeric
                        and a.application_name = left(format('herd:%%s.%%s:%%s', f.epoch, f.start, f.name), 63))
)
select a.pid, a.backend_start, coalesce(a.usename, ''), coalesce(a.application_name, ''), coalesce(a.state, '')
  from pg_stat_activity a
 where a.pid <> pg_backend_pid()
   and (a.pid in (select b.pid from blocking b)
        or a.pid in (select n.pid from named n
                      where (n.epoch, n.start) < (%(epoch)s::numeric, %(start)s::numeric))
        or exists (select from herd.sessions s
                    where s.pid = a.pid and s.backend_start = a.backend_start and s.name = %(name)s
                      and (s.epoch, s.start) < (%(epoch)s, %(start)s)))
   and coalesce(a.application_name, '') <> %(raisers)s
 order by a.pid

-- name: terminate
-- End a session, unless its pid belongs to another one by now.
select pg_terminate_backend(a.pid)
  from pg_stat_activity a
 where a.pid = %(pid)s and a.backend_start is not distinct from %(backend_start)s

-- name: raiser_waits
-- What a raiser waits for: a prepared transaction (which has no session), or its own commit.
select coalesce(a.wait_event, ''), coalesce(p.gid, ''), coalesce(p.owner, '')
  from pg_stat_activity a
       left join pg_locks l on l.pid = a.pid and not l.granted
       left join pg_prepared_xacts p on p.transaction = l.transactionid
 where a.pid = %(raiser)s
 limit 1

-- name: worker_setup
-- Limits of a worker's session, in milliseconds.
select herd.version(),
       set_config('statement_timeout', %(statement)s, false),
       set_config('idle_in_transaction_session_timeout', %(idle)s, false)

-- name: register_session
-- Let a later raise end this session.
select herd.register_session(%(name)s, %(epoch)s, %(start)s)

-- name: begin
-- Open a fenced transaction.  Two statements in one message: parameters are literals.
begin isolation level {isolation} read write; select herd.fence({name}, {epoch}, {start})

-- name: begin_read_only
-- Open a transaction that cannot write, on a primary or a standby.
begin isolation level {isolation} read only; select herd.check_fence({name}, {epoch}, {start})

-- name: assert_fence
-- The last statement before COMMIT.
select herd.assert_fence(%(name)s, %(epoch)s, %(start)s)

-- name: commit
commit

-- name: rollback
rollback

-- name: check_fence
-- Say why a token may not act any more, if so.
select herd.check_fence(%(name)s, %(epoch)s, %(start)s)

-- name: installed_schema
-- Is there a schema herd, is it ours, and which version is it?
select exists (select from pg_namespace where nspname = 'herd'),
       to_regprocedure('herd.version()') is not null

-- name: install_lock
-- One installation at a time in one database.
select pg_advisory_xact_lock(7522818962049459813)

-- name: identify
select herd.identify(%(cluster)s)

-- name: grant_roles
select herd.grant_roles()

-- name: all_tables_publications
-- Publications that would copy fences to other servers.
select pubname from pg_publication where puballtables order by 1

-- name: check_installation
select herd.check_installation()

-- name: installation
select i.cluster, i.incarnation, i.installed_at from herd.installation i

-- name: fences
-- Fences, and whether a transaction with their token would pass on this server.
select f.name, f.epoch, f.start, f.node, f.raised_at,
       f.system_identifier = (select c.system_identifier from pg_control_system() c)
         and (pg_is_in_recovery() or f.timeline = herd.timeline())
  from herd.fences f
 order by f.name

-- name: server
select current_database(), pg_is_in_recovery(), current_setting('server_version')
