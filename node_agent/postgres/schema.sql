-- Schema herd, version 1: fences.  Plain SQL and PL/pgSQL for PostgreSQL 14 and later; no superuser needed.
-- Installed by `pgherd sql install DATABASE`, in one transaction.
--
-- A token is (epoch, start): epoch grows with every change of ownership of a name in the whole cluster, start
-- with every process of one ownership.  Every fenced transaction holds a share lock on the fence row with its
-- own token until it ends, and raising the fence updates that row: so after a raise has returned, no transaction
-- of a lower token can commit, whatever its process still believes.

create schema herd;
comment on schema herd is 'pgherd: fences, which let only the present owner of a name commit';

create function herd.version() returns integer
language sql immutable parallel safe
return 1;
comment on function herd.version() is
  'Version of this schema; programs of another version refuse to work with it.';

create table herd.installation (
  only_row          boolean primary key default true check (only_row),
  cluster           text not null check (cluster <> ''),
  incarnation       bigint not null default 0,
  system_identifier bigint not null,
  database_oid      oid not null,
  installed_at      timestamptz not null default now()
);
comment on table herd.installation is
  'Which pgherd cluster works in which database of which server; a restored copy is recognised by the difference.';

create table herd.fence_intent (
  name    text primary key check (name <> '' and octet_length(name) <= 200),
  epoch   bigint not null check (epoch > 0),
  start   integer not null check (start > 0),
  node    text not null,
  at      timestamptz not null
);
comment on table herd.fence_intent is
  'First step of a raise: tokens below are refused at once, so that share lockers cannot overtake the second step.';

create table herd.fences (
  name              text primary key check (name <> '' and octet_length(name) <= 200),
  epoch             bigint not null check (epoch > 0),
  start             integer not null check (start > 0),
  node              text not null,
  system_identifier bigint not null,
  timeline          bigint not null,
  raised_at         timestamptz not null
);
comment on table herd.fences is
  'The highest token of each name, and the server and timeline it was raised on: a promotion closes every fence.';

-- Sessions do not outlive a crash, so neither need their rows.
create unlogged table herd.sessions (
  pid           integer not null,
  backend_start timestamptz not null,
  name          text not null,
  epoch         bigint not null,
  start         integer not null,
  primary key (pid, backend_start, name)
);
comment on table herd.sessions is
  'Server sessions of workers and their tokens: a raise ends those with a lower one.';

create function herd.timeline() returns bigint
language sql volatile
set search_path = pg_catalog, pg_temp
-- Not pg_control_checkpoint(): right after a promotion the control file still has the old timeline.
as $$ select ('x' || substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8))::bit(32)::bigint $$;
comment on function herd.timeline() is
  'Timeline this server writes on; an error on a standby.';

create function herd.check_primary() returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  if pg_is_in_recovery() then
    raise exception 'this server is a standby: nothing can be fenced here'
      using errcode = 'read_only_sql_transaction',
            hint = 'Connect to the primary, for example with target_session_attrs=read-write in the conninfo.';
  end if;
end
$$;
comment on function herd.check_primary() is
  'Raises 25006 on a standby.';

create function herd.check_installation() returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  installed herd.installation;
  server bigint := (select c.system_identifier from pg_control_system() c);
  database oid := (select d.oid from pg_database d where d.datname = current_database());
begin
  select * into installed from herd.installation;
  if not found then
    raise exception 'schema herd in database "%" belongs to no cluster', current_database()
      using errcode = 'object_not_in_prerequisite_state',
            hint = 'Run: pgherd sql install ' || current_database();
  end if;
  if (installed.system_identifier, installed.database_oid) is distinct from (server, database) then
    raise exception 'database "%" is a copy: schema herd was installed in another one', current_database()
      using errcode = 'object_not_in_prerequisite_state',
            detail = format('Installed for cluster "%s" in database oid %s of system %s; this is database oid %s of system %s.',
                            installed.cluster, installed.database_oid, installed.system_identifier, database, server),
            hint = 'If the daemons of a cluster shall work in this copy, install again: pgherd sql install '
                   || current_database();
  end if;
end
$$;
comment on function herd.check_installation() is
  'Raises 55000 where this database is a copy of the one that herd was installed in.';

create function herd.refuse(name text, epoch bigint, start integer) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  token constant text := format('%s.%s', refuse.epoch, refuse.start);
  wanted herd.fence_intent;
  held herd.fences;
begin
  perform herd.check_installation();
  select * into held from herd.fences f where f.name = refuse.name;
  select * into wanted from herd.fence_intent i where i.name = refuse.name;
  if wanted.name is null or (held.epoch, held.start) > (wanted.epoch, wanted.start) then
    wanted.epoch := held.epoch;
    wanted.start := held.start;
    wanted.node := held.node;
  end if;
  if (wanted.epoch, wanted.start) > (refuse.epoch, refuse.start) then
    raise exception '%: epoch % is superseded by epoch %', refuse.name, token,
                    format('%s.%s', wanted.epoch, wanted.start)
      using errcode = 'PH001',
            detail = format('Nothing of this transaction is committed; the owner is on node %s.', wanted.node),
            hint = 'The process with the old epoch must end; do not retry with its epoch.';
  end if;
  if held.name is null then
    raise exception '%: no fence was ever raised in database "%"', refuse.name, current_database()
      using errcode = 'PH001',
            hint = 'The agent raises it before it starts a process whose spec says fence = [...] with this database.';
  end if;
  if (held.epoch, held.start) is distinct from (refuse.epoch, refuse.start) then
    raise exception '%: epoch % is not raised, the fence is at epoch %', refuse.name, token,
                    format('%s.%s', held.epoch, held.start)
      using errcode = 'PH001',
            hint = 'The agent raises the fence before it starts a process; use the epoch and start it was given.';
  end if;
  raise exception '%: the fence of epoch % is closed', refuse.name, token
    using errcode = 'PH001',
          detail = case when pg_is_in_recovery() then 'This server is a standby.'
                   else format('It was raised on timeline %s, this server writes on timeline %s.',
                               held.timeline, herd.timeline()) end,
          hint = 'A promotion closes every fence; the agent opens it again once it has confirmed its ownership.';
end
$$;
comment on function herd.refuse(text, bigint, integer) is
  'Raises PH001 (or 55000 in a copied database) and says why the token may not act; never returns.';

create function herd.assert_fence(name text, epoch bigint, start integer) returns void
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  perform herd.check_primary();
  -- FOR SHARE, nothing weaker: FOR KEY SHARE or a plain read would let the raise overtake this transaction.
  perform from herd.fences f, herd.installation i
    where f.name = assert_fence.name and f.epoch = assert_fence.epoch and f.start = assert_fence.start
      and f.system_identifier = i.system_identifier
      and f.system_identifier = (select c.system_identifier from pg_control_system() c)
      and f.timeline = herd.timeline()
      and i.database_oid = (select d.oid from pg_database d where d.datname = current_database())
    for share of f;
  if not found then
    perform herd.refuse(assert_fence.name, assert_fence.epoch, assert_fence.start);
  end if;
end
$$;
comment on function herd.assert_fence(text, bigint, integer) is
  'Last statement before COMMIT: takes the share lock again that a ROLLBACK TO SAVEPOINT may have given up; PH001 if superseded.';

create function herd.fence(name text, epoch bigint, start integer) returns void
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  mine constant text := format('%s.%s:%s', fence.epoch, fence.start, fence.name);
  token constant text := coalesce(current_setting('herd.token', true), '');
  guard constant bigint := 7522818962049459812;
begin
  if token not in ('', mine) then
    raise exception 'this transaction is already fenced as %', token
      using errcode = 'invalid_parameter_value',
            hint = 'One transaction works for one name; use another transaction for the other.';
  end if;
  perform herd.check_primary();
  -- A waiting raise is not to be overtaken for ever by new share locks.
  perform from herd.fence_intent i
    where i.name = fence.name and (i.epoch, i.start) > (fence.epoch, fence.start);
  if found then
    perform herd.refuse(fence.name, fence.epoch, fence.start);
  end if;
  perform herd.assert_fence(fence.name, fence.epoch, fence.start);
  perform set_config('herd.token', mine, true);
  if current_setting('max_prepared_transactions')::integer > 0 then
    -- A prepared transaction would keep the share lock without a session that could be ended.  PostgreSQL
    -- refuses PREPARE TRANSACTION where one key is locked both for the session and for the transaction.
    perform pg_advisory_xact_lock_shared(guard);
    if coalesce(current_setting('herd.guard', true), '') <> 'on' then
      perform pg_advisory_lock_shared(guard);
      perform set_config('herd.guard', 'on', false);
    end if;
  end if;
end
$$;
comment on function herd.fence(text, bigint, integer) is
  'First statement of a fenced transaction, before any savepoint: from here to its end nobody else can become owner; PH001 if somebody did.';

create function herd.check_fence(name text, epoch bigint, start integer) returns void
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  perform herd.check_installation();
  perform from herd.fences f
    where f.name = check_fence.name and f.epoch = check_fence.epoch and f.start = check_fence.start
      and not exists (select from herd.fence_intent i where i.name = f.name
                      and (i.epoch, i.start) > (check_fence.epoch, check_fence.start));
  if not found then
    perform herd.refuse(check_fence.name, check_fence.epoch, check_fence.start);
  end if;
end
$$;
comment on function herd.check_fence(text, bigint, integer) is
  'PH001 if the token is superseded as far as this server knows; takes no lock, so it protects reads only. Works on standbys.';

create function herd.raise_intent(name text, epoch bigint, start integer, node text, cluster text default '')
returns void
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  installed herd.installation;
begin
  perform herd.check_primary();
  perform herd.check_installation();
  -- An acknowledged raise must survive a crash; remote_apply is stronger, and stays.
  if current_setting('synchronous_commit') <> 'remote_apply' then
    perform set_config('synchronous_commit', 'on', true);
  end if;
  select * into installed from herd.installation;
  if raise_intent.cluster not in ('', installed.cluster) then
    raise exception 'database "%" belongs to cluster "%", not to "%"', current_database(), installed.cluster,
                    raise_intent.cluster
      using errcode = 'object_not_in_prerequisite_state',
            hint = 'Give every cluster databases of its own: epochs of two clusters cannot be compared.';
  end if;
  if raise_intent.epoch >> 48 < installed.incarnation then
    raise exception '%: epoch % is superseded by epoch %', raise_intent.name,
                    format('%s.%s', raise_intent.epoch, raise_intent.start),
                    format('%s.0', installed.incarnation << 48)
      using errcode = 'PH001',
            detail = format('The cluster is in incarnation %s, the epoch is of %s.', installed.incarnation,
                            raise_intent.epoch >> 48);
  end if;
  update herd.installation i set incarnation = raise_intent.epoch >> 48
    where i.incarnation < raise_intent.epoch >> 48;
  -- Written also for an equal token: its commit then waits until an earlier, unacknowledged raise is durable.
  insert into herd.fence_intent as i
    values (raise_intent.name, raise_intent.epoch, raise_intent.start, raise_intent.node, clock_timestamp())
    on conflict on constraint fence_intent_pkey do update
      set epoch = excluded.epoch, start = excluded.start, node = excluded.node, at = excluded.at
      where (i.epoch, i.start) <= (excluded.epoch, excluded.start);
  if not found then
    perform herd.refuse(raise_intent.name, raise_intent.epoch, raise_intent.start);
  end if;
end
$$;
comment on function herd.raise_intent(text, bigint, integer, text, text) is
  'Step 1 of a raise, in a transaction of its own: from its commit on, herd.fence refuses every lower token. PH001 if superseded.';

create function herd.raise_fence(name text, epoch bigint, start integer, node text) returns void
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  wanted herd.fence_intent;
  server bigint := (select c.system_identifier from pg_control_system() c);
  line bigint;
begin
  perform herd.check_primary();
  perform herd.check_installation();
  line := herd.timeline();
  if current_setting('synchronous_commit') <> 'remote_apply' then
    perform set_config('synchronous_commit', 'on', true);
  end if;
  select * into wanted from herd.fence_intent i where i.name = raise_fence.name;
  if (wanted.epoch, wanted.start) is distinct from (raise_fence.epoch, raise_fence.start) then
    if (wanted.epoch, wanted.start) > (raise_fence.epoch, raise_fence.start) then
      perform herd.refuse(raise_fence.name, raise_fence.epoch, raise_fence.start);
    end if;
    raise exception '%: the intent to raise epoch % is not committed yet', raise_fence.name,
                    format('%s.%s', raise_fence.epoch, raise_fence.start)
      using errcode = 'object_not_in_prerequisite_state',
            hint = 'Call herd.raise_intent first, in a transaction of its own.';
  end if;
  -- Equal is success, without a lock: transactions of the same token may be open.
  perform from herd.fences f
    where f.name = raise_fence.name and f.epoch = raise_fence.epoch and f.start = raise_fence.start
      and f.system_identifier = server and f.timeline = line;
  if not found then
    insert into herd.fences as f
      values (raise_fence.name, raise_fence.epoch, raise_fence.start, raise_fence.node, server, line,
              clock_timestamp())
      on conflict on constraint fences_pkey do update
        set epoch = excluded.epoch, start = excluded.start, node = excluded.node,
            system_identifier = excluded.system_identifier, timeline = excluded.timeline,
            raised_at = excluded.raised_at
        where (f.epoch, f.start) <= (excluded.epoch, excluded.start);
    if not found then
      perform herd.refuse(raise_fence.name, raise_fence.epoch, raise_fence.start);
    end if;
  end if;
  delete from herd.sessions s
    where s.name = raise_fence.name and (s.epoch, s.start) < (raise_fence.epoch, raise_fence.start)
      and not exists (select from pg_stat_activity a where a.pid = s.pid);
end
$$;
comment on function herd.raise_fence(text, bigint, integer, text) is
  'Step 2 of a raise: waits for transactions of lower tokens, which the caller ends; from its commit on none of them can commit. PH001 if superseded.';

create function herd.backend_start() returns timestamptz
language sql volatile
set search_path = pg_catalog, pg_temp
as $$ select a.backend_start from pg_stat_get_activity(pg_backend_pid()) a $$;
comment on function herd.backend_start() is
  'When the present session began; with its pid it identifies the session.';

create function herd.register_session(name text, epoch bigint, start integer,
                                      backend_start timestamptz default herd.backend_start())
returns void
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  perform herd.check_primary();
  perform from herd.fence_intent i
    where i.name = register_session.name
      and (i.epoch, i.start) > (register_session.epoch, register_session.start);
  if found then
    perform herd.refuse(register_session.name, register_session.epoch, register_session.start);
  end if;
  delete from herd.sessions s where s.pid = pg_backend_pid() and s.backend_start <> register_session.backend_start;
  insert into herd.sessions as s
    values (pg_backend_pid(), register_session.backend_start, register_session.name, register_session.epoch,
            register_session.start)
    on conflict on constraint sessions_pkey do update set epoch = excluded.epoch, start = excluded.start;
end
$$;
comment on function herd.register_session(text, bigint, integer, timestamptz) is
  'Once per connection of a worker, committed: lets a later raise end this session. PH001 if superseded.';

create function herd.require_fence() returns trigger
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  owner constant text := tg_argv[0];
  token constant text[] := regexp_match(current_setting('herd.token', true), '^(\d{1,19})\.(\d{1,10}):(.+)$');
begin
  if token[3] is distinct from owner then
    raise exception 'only the owner of % may write table %.%', owner, tg_table_schema, tg_table_name
      using errcode = 'PH001',
            detail = case when token is null then 'This transaction is not fenced.'
                     else format('This transaction is fenced as %s.', token[3]) end,
            hint = format('Call herd.fence(%L, epoch, start) first in the transaction.', owner);
  end if;
  perform herd.assert_fence(owner, token[1]::bigint, token[2]::integer);
  return null;
end
$$;
comment on function herd.require_fence() is
  'Trigger of herd.protect: PH001 unless this transaction carries the present token of the name.';

create function herd.protected_tables(target regclass) returns setof regclass
language sql stable
set search_path = pg_catalog, pg_temp
as $$
  with recursive tree(relation) as (
    select target::oid
    union
    select i.inhrelid from tree join pg_inherits i on i.inhparent = tree.relation
  )
  select c.oid::regclass from tree join pg_class c on c.oid = tree.relation where c.relkind in ('r', 'p')
$$;
comment on function herd.protected_tables(regclass) is
  'The table and its present partitions and children: statement triggers are not inherited.';

create function herd.protect(target regclass, name text) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  relation regclass;
begin
  for relation in select herd.protected_tables(target) loop
    execute format('create or replace trigger herd_fence before insert or update or delete or truncate on %s '
                   'for each statement execute function herd.require_fence(%L)', relation, protect.name);
  end loop;
end
$$;
comment on function herd.protect(regclass, text) is
  'From now on only fenced transactions of the present owner of the name write to the table. Repeat it for partitions made later.';

create function herd.unprotect(target regclass) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  relation regclass;
begin
  for relation in select herd.protected_tables(target) loop
    execute format('drop trigger if exists herd_fence on %s', relation);
  end loop;
end
$$;
comment on function herd.unprotect(regclass) is
  'Ends herd.protect for the table.';

create function herd.identify(cluster text) returns text
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  before herd.installation;
  server bigint := (select c.system_identifier from pg_control_system() c);
  database oid := (select d.oid from pg_database d where d.datname = current_database());
begin
  select * into before from herd.installation for update;
  if (before.cluster, before.system_identifier, before.database_oid) is not distinct from
     (identify.cluster, server, database) then
    return 'same';
  end if;
  -- Epochs of another cluster say nothing here.  Those of the same one stay, so that they can only grow; their
  -- fences are closed until they are raised on this server.
  if before.cluster is distinct from identify.cluster then
    delete from herd.fences;
    delete from herd.fence_intent;
  end if;
  delete from herd.sessions;
  delete from herd.installation;
  insert into herd.installation (cluster, incarnation, system_identifier, database_oid)
    values (identify.cluster,
            case when before.cluster = identify.cluster then before.incarnation else 0 end, server, database);
  return case when before.cluster is null then 'new' else 'copy' end;
end
$$;
comment on function herd.identify(text) is
  'Declares this database to be the one that the cluster works in: new, same, or copy (it was another one before).';

create function herd.grant_roles() returns setof text
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  name text;
begin
  foreach name in array array['herd_worker', 'herd_admin'] loop
    if not exists (select from pg_roles r where r.rolname = name) then
      begin
        execute format('create role %I nologin', name);
      exception
        when insufficient_privilege then
          return next format('role %1$s does not exist, and %2$s may not create it. Let somebody who may run '
                             '"create role %1$s nologin", then install again; or grant by hand what '
                             'herd.grant_roles() grants', name, current_user);
          continue;
        when duplicate_object then null;  -- installed into two databases at once
      end;
    end if;
    execute format('grant usage on schema herd to %I', name);
    execute format('grant execute on function herd.version(), herd.fence(text, bigint, integer), '
                   'herd.assert_fence(text, bigint, integer), herd.check_fence(text, bigint, integer), '
                   'herd.backend_start(), herd.register_session(text, bigint, integer, timestamptz) to %I', name);
    if name = 'herd_admin' then
      execute format('grant select on all tables in schema herd to %I', name);
      execute format('grant execute on function herd.raise_intent(text, bigint, integer, text, text), '
                     'herd.raise_fence(text, bigint, integer, text), herd.timeline(), herd.check_installation(), '
                     'herd.require_fence(), '
                     'herd.protected_tables(regclass), herd.protect(regclass, text), '
                     'herd.unprotect(regclass) to %I', name);
    end if;
  end loop;
end
$$;
comment on function herd.grant_roles() is
  'Makes roles herd_worker (works under a fence) and herd_admin (raises fences) where allowed and grants them their rights; returns what is missing.';

revoke all on all functions in schema herd from public;
