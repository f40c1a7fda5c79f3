defmodule DemandPort.Credit do
  @moduledoc """
  How many stream messages a demand may still send, and when to allow more.

  The window is what the demand was opened with. Of what was delivered, so much is granted anew that what is under way
  and what lies in the consumer's mailbox together are never more than the window. That is looked at once half a window
  was delivered, so that the service does not run dry while the consumer keeps up, and a grant costs one message in
  `window / 2` chunks. This module is arithmetic; the connection sends.

      iex> credit = DemandPort.Credit.new(4) |> DemandPort.Credit.delivered() |> DemandPort.Credit.delivered()
      iex> DemandPort.Credit.due?(credit)
      true
      iex> {grant, _credit} = DemandPort.Credit.grant(credit, 0)
      iex> grant
      2
      iex> {grant, _credit} = DemandPort.Credit.grant(credit, 1)
      iex> grant
      0
  """

  @enforce_keys [:window]
  defstruct [:window, used: 0, taken: 0]

  @type window :: non_neg_integer | :infinity
  @type t :: %__MODULE__{window: window, used: non_neg_integer, taken: non_neg_integer}

  @doc "The credit of a demand opened with this window; `:infinity` is a stream without limit."
  @spec new(window) :: t
  def new(:infinity), do: %__MODULE__{window: :infinity}
  def new(window) when is_integer(window) and window >= 0, do: %__MODULE__{window: window}

  @doc "Counts one delivered stream message."
  @spec delivered(t) :: t
  def delivered(%__MODULE__{window: :infinity} = credit), do: credit
  def delivered(%__MODULE__{used: used} = credit), do: %{credit | used: used + 1}

  @doc "Enough was delivered to look whether more may be granted. A window of 0 is a demand that wants no stream."
  @spec due?(t) :: boolean
  def due?(%__MODULE__{window: window}) when window in [0, :infinity], do: false
  def due?(%__MODULE__{window: window, used: used}), do: 2 * used >= window

  @doc "How many to grant while `backlog` messages wait for the consumer: half a window or more, or none yet."
  @spec grant(t, non_neg_integer) :: {non_neg_integer, t}
  def grant(%__MODULE__{window: window, used: used} = credit, backlog) do
    if 2 * (used - backlog) >= window, do: {used - backlog, %{credit | used: backlog}}, else: {0, credit}
  end

  @doc "How many to grant now that the consumer took `n` more: all it took, once that is half a window."
  @spec consumed(t, pos_integer) :: {non_neg_integer, t}
  def consumed(%__MODULE__{window: window} = credit, _n) when window in [0, :infinity], do: {0, credit}

  def consumed(%__MODULE__{window: window, used: used} = credit, n) do
    taken = min(credit.taken + n, used)

    if 2 * taken >= window,
      do: {taken, %{credit | used: used - taken, taken: 0}},
      else: {0, %{credit | taken: taken}}
  end

  @doc "The service may send nothing more until it is granted some."
  @spec exhausted?(t) :: boolean
  def exhausted?(%__MODULE__{window: window}) when window in [0, :infinity], do: false
  def exhausted?(%__MODULE__{window: window, used: used}), do: used >= window
end
