%% The reference: a gen_server with a global name on one node, called by processes of another.
-module(herd_bench).
-behaviour(gen_server).
-export([serve/0, measure/1, init/1, handle_call/3, handle_cast/2]).

-define(NAME, {global, echo}).
-define(PAYLOAD, binary:copy(<<"x">>, 100)).

%% The node with the daemon.
serve() ->
    {ok, _} = gen_server:start(?NAME, ?MODULE, [], []),
    io:format("serving~n"),
    receive stop -> ok end.

init([]) -> {ok, 0}.
handle_call({echo, Payload}, _From, Told) -> {reply, Payload, Told};
handle_call(count, _From, Told) -> {reply, Told, Told}.
handle_cast({tell, _Payload}, Told) -> {noreply, Told + 1}.

%% The node with the callers: one line for each round asked for on stdin, "CALLS/S CASTS/S".
measure(Server) ->
    pong = net_adm:ping(Server),
    ok = global:sync(),
    rounds().

rounds() ->
    case io:get_line("") of
        eof -> halt(0);
        _ ->
            _ = calls(2000),
            Calls = calls(20000),
            Casts = casts(100000),
            io:format("~.1f ~.1f~n", [Calls, Casts]),
            rounds()
    end.

calls(Total) ->
    Callers = 64,
    Each = Total div Callers,
    rate(Callers * Each, fun() ->
        Running = [spawn_monitor(fun() -> call(Each, ?PAYLOAD) end) || _ <- lists:seq(1, Callers)],
        [receive {'DOWN', Ref, process, _, Why} -> normal = Why end || {_, Ref} <- Running]
    end).

call(0, _) -> ok;
call(Left, Payload) ->
    Payload = gen_server:call(?NAME, {echo, Payload}, infinity),
    call(Left - 1, Payload).

%% The call at the end is answered after every cast was handled.
casts(Total) ->
    Payload = ?PAYLOAD,
    Before = gen_server:call(?NAME, count),
    rate(Total, fun() ->
        [gen_server:cast(?NAME, {tell, Payload}) || _ <- lists:seq(1, Total)],
        Total = gen_server:call(?NAME, count, infinity) - Before
    end).

rate(Count, Work) ->
    Began = erlang:monotonic_time(nanosecond),
    Work(),
    Count * 1.0e9 / (erlang:monotonic_time(nanosecond) - Began).
