defmodule DemandPort.Credit do
  @moduledoc """
  How many stream messages a demand may still send, and when to allow more.

  The window is what the demand was opened with. More is granted in one message for every half window that was
  delivered, so that the service never runs dry while the consumer keeps up, and a grant costs one message in
  `window / 2` chunks. This module is arithmetic; the connection sends.

      iex> credit = DemandPort.Credit.new(4)
      iex> {0, credit} = DemandPort.Credit.delivered(credit)
      iex> {grant, _credit} = DemandPort.Credit.delivered(credit)
      iex> grant
      2
  """

  @enforce_keys [:window]
  defstruct [:window, used: 0]

  @type t :: %__MODULE__{window: non_neg_integer | :infinity, used: non_neg_integer}

  @doc "The credit of a demand opened with this window; `:infinity` is a stream without limit."
  @spec new(non_neg_integer | :infinity) :: t
  def new(:infinity), do: %__MODULE__{window: :infinity}
  def new(window) when is_integer(window) and window >= 0, do: %__MODULE__{window: window}

  @doc "Counts one delivered stream message; returns how many to grant now, mostly 0."
  @spec delivered(t) :: {grant :: non_neg_integer, t}
  def delivered(%__MODULE__{window: :infinity} = credit), do: {0, credit}
  # A window of 0 is a demand that wants no stream at all.
  def delivered(%__MODULE__{window: 0} = credit), do: {0, credit}

  def delivered(%__MODULE__{window: window, used: used} = credit) do
    used = used + 1
    if 2 * used >= window, do: {used, %{credit | used: 0}}, else: {0, %{credit | used: used}}
  end
end
