# Tests tagged :service need the Python service; DEMAND_PORT_PYTHON names a Python that has its dependencies.
service? = DemandPort.Test.Services.real?()
unless service?, do: IO.puts("the service does not start here: tests tagged :service are left out")
ExUnit.start(exclude: if(service?, do: [], else: [:service]), capture_log: true)
