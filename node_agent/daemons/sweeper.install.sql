-- Schema herd_sweeper: what the sweeper deletes, and what it has deleted.  Installed by
-- node_agent.daemons.sweeper_schema, or by hand in psql after `pgherd sql install`:
--     \i node_agent/daemons/sweeper.install.sql
-- The sweeper's role needs herd_worker, and DELETE and SELECT on the tables that policies name.

create schema herd_sweeper;
comment on schema herd_sweeper is 'pgherd: policies and accounts of the sweeper, which deletes rows past their age';

create table herd_sweeper.policy (
  relation   text primary key,
  age_column name not null,
  keep       interval not null check (keep >= interval '0'),
  batch_size integer not null default 1000 check (batch_size between 1 and 100000),
  enabled    boolean not null default true
);
comment on table herd_sweeper.policy is
  'Rows of relation (schema-qualified unless it is in the sweeper''s search_path) whose age_column is older than keep are deleted, batch_size in a transaction. An index on age_column makes it cheap.';

create table herd_sweeper.control (
  only_row boolean primary key default true check (only_row),
  paused   boolean not null default false
);
comment on table herd_sweeper.control is 'paused stops all sweeping, whoever owns the name, until it is resumed.';
insert into herd_sweeper.control default values;

create table herd_sweeper.log (
  id       bigint generated always as identity primary key,
  at       timestamptz not null default clock_timestamp(),
  relation text not null,
  epoch    bigint not null,
  start    integer not null,
  deleted  integer not null check (deleted > 0),
  oldest   timestamptz not null,
  newest   timestamptz not null
);
create index on herd_sweeper.log (at);
comment on table herd_sweeper.log is
  'One row for each batch, written by the transaction that deleted it: who (epoch, start), how many, and their range of age_column.';

insert into herd_sweeper.policy values ('herd_sweeper.log', 'at', interval '90 days');

create function herd_sweeper.sweep(relation text, epoch bigint, start integer) returns integer
language plpgsql volatile
as $$
declare
  policy herd_sweeper.policy;
  target regclass;
  batch record;
begin
  select * into policy from herd_sweeper.policy p where p.relation = sweep.relation and p.enabled;
  if not found then
    return 0;
  end if;
  target := to_regclass(policy.relation);
  if target is null then
    raise exception 'table % does not exist', policy.relation using errcode = 'undefined_table';
  end if;
  perform from pg_attribute a
    where a.attrelid = target and a.attname = policy.age_column and a.attnum > 0 and not a.attisdropped
      and a.atttypid in ('timestamptz'::regtype, 'timestamp'::regtype, 'date'::regtype);
  if not found then
    raise exception 'table % has no column % of a date or timestamp type', target, policy.age_column
      using errcode = 'undefined_column';
  end if;
  -- The age is checked again outside: in a partitioned table a ctid is not unique.
  execute format(
    'with gone as (
       delete from %1$s
        where ctid = any (array(select ctid from %1$s where %2$I < $1 limit $2 for update skip locked))
          and %2$I < $1
       returning %2$I::timestamptz as age)
     select count(*)::integer as deleted, min(age) as oldest, max(age) as newest from gone',
    target, policy.age_column) into batch using now() - policy.keep, policy.batch_size;
  if batch.deleted > 0 then
    insert into herd_sweeper.log (relation, epoch, start, deleted, oldest, newest)
      values (policy.relation, sweep.epoch, sweep.start, batch.deleted, batch.oldest, batch.newest);
  end if;
  return batch.deleted;
end
$$;
comment on function herd_sweeper.sweep(text, bigint, integer) is
  'Deletes one batch by a policy and writes it into the log; returns how many rows.';

revoke all on function herd_sweeper.sweep(text, bigint, integer) from public;
do $$
begin
  if exists (select from pg_roles where rolname = 'herd_worker') then
    grant usage on schema herd_sweeper to herd_worker;
    grant select on herd_sweeper.policy, herd_sweeper.control, herd_sweeper.log to herd_worker;
    grant update on herd_sweeper.control to herd_worker;
    grant insert, delete, update on herd_sweeper.log to herd_worker;
    grant execute on function herd_sweeper.sweep(text, bigint, integer) to herd_worker;
  end if;
end
$$;
