#!/usr/bin/env escript
%% A port without any client, in Erlang.
%%
%%     escript examples/bare_port.erl
%%
%% DEMAND_PORT_PYTHON names the Python to use.
-mode(compile).

main(_) ->
    Port = open(),
    %% `safe` makes no atoms; this function's own clauses name those of the protocol.
    {ready, #{<<"protocol">> := Protocol}} = next(Port),
    io:format("ready: protocol ~p~n", [Protocol]),
    send(Port, {open, 1, <<"s">>, graph(), #{}}),
    {ok, 1, _Opened} = next(Port),
    send(Port, {demand, 2, <<"s">>, <<"out">>, #{}}),
    Status = until_terminal(Port),
    port_close(Port),
    halt(Status).

open() ->
    Python = os:find_executable(os:getenv("DEMAND_PORT_PYTHON", "python3")),
    Root = filename:dirname(filename:dirname(filename:absname(escript:script_name()))),
    Path = filename:join(Root, "python") ++ ":" ++ os:getenv("PYTHONPATH", ""),
    open_port({spawn_executable, Python},
              [binary, exit_status, {packet, 4},
               {args, ["-m", "demandport", "serve", "--codec", "etf"]},
               {env, [{"PYTHONPATH", Path}]}]).

send(Port, Message) ->
    port_command(Port, term_to_binary(Message)).

next(Port) ->
    receive
        {Port, {data, Payload}} -> binary_to_term(Payload, [safe]);
        {Port, {exit_status, Status}} -> exit({service_ended, Status})
    after 30000 -> exit(no_message)
    end.

%% Chunks, then the end of the demand: the first three elements are what a gen_server would match on.
until_terminal(Port) ->
    case next(Port) of
        {node_stream, Node, Chunk, 2, _Seq, _Port} ->
            io:format("~p~n", [{node_stream, Node, Chunk}]),
            until_terminal(Port);
        {demand_complete, Node, Outputs, 2, _Meta} ->
            io:format("~p~n", [{demand_complete, Node, Outputs}]),
            0;
        {demand_error, Node, Error, 2, _Meta} ->
            io:format("~p~n", [{demand_error, Node, Error}]),
            1;
        {log, _Level, _Logger, _Text, _Metadata} ->
            until_terminal(Port)
    end.

graph() ->
    #{<<"nodes">> =>
          [#{<<"id">> => <<"in">>, <<"node_type">> => <<"text-input">>, <<"data">> => #{<<"text">> => <<"port">>}},
           #{<<"id">> => <<"greet">>, <<"node_type">> => <<"template">>,
             <<"data">> => #{<<"template">> => <<"Hello, {{name}}!">>}},
           #{<<"id">> => <<"out">>, <<"node_type">> => <<"text-output">>, <<"data">> => #{}}],
      <<"edges">> =>
          [edge(<<"1">>, <<"in">>, <<"text">>, <<"greet">>, <<"name">>),
           edge(<<"2">>, <<"greet">>, <<"text">>, <<"out">>, <<"text">>)]}.

edge(Id, Source, SourceHandle, Target, TargetHandle) ->
    #{<<"id">> => Id, <<"source">> => Source, <<"source_handle">> => SourceHandle,
      <<"target">> => Target, <<"target_handle">> => TargetHandle}.
