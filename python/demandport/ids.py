"""Distinct types for the ids that travel through the service, so that a checker finds one used for another."""

from __future__ import annotations

from typing import NewType

RequestId = NewType("RequestId", int)
DemandId = NewType("DemandId", int)
CallId = NewType("CallId", int)
SessionId = NewType("SessionId", str)
NodeId = NewType("NodeId", str)
PortName = NewType("PortName", str)
ModelId = NewType("ModelId", str)
WorkerId = NewType("WorkerId", str)
