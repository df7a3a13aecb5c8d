import Accelerator

// What it takes to know a running guest as it was at a moment, again and again, and to let nobody hear what it said since.

extension VirtualMachine {
    /// Has the guest stand still for a moment, whatever its run state is or becomes. Does not wait: a vCPU may sleep for a page.
    public func hold() { gate.hold { for cpu in accelerator?.cpus ?? [] { cpu.kick() } } }

    /// The guest goes on, if it runs.
    public func endHold() { gate.release() }

    /// Runs `body` while the guest stands still and nothing happens to the machine; `hold` came before.
    /// - Parameters:
    ///   - isAwaited: asked from time to time while a vCPU is waited for.
    ///   - body: told whether the guest runs, but for that.
    /// - Returns: `nil` if it did not come to that: nobody awaits it any more, or something the guest asked for is to be done first.
    public func whileHeld<R, E: Error>(
        awaited isAwaited: () -> Bool, _ body: (_ guestRuns: Bool) throws(E) -> R
    ) throws(E) -> R? {
        guard gate.waitUntilEmpty(while: isAwaited) else { return nil }
        return try whileUnchanged { (state) throws(E) -> R? in
            guard state == .running || state == .paused else { return nil }
            return try body(state == .running)
        }
    }

    /// From here on nothing that the guest says is heard before it is released.
    /// - Parameter tooMuch: called when it said so much that it should stand still until that is released; must not wait.
    public func holdOutput(tooMuch: @escaping @Sendable () -> Void) { serial.holdOutput(tooMuch: tooMuch) }

    /// What the guest said up to here belongs to that epoch.
    public func cutOutput(epoch: UInt64) { serial.cutOutput(epoch: epoch) }

    public func releaseOutput(upTo epoch: UInt64) { serial.releaseOutput(upTo: epoch) }

    /// All that the guest said is heard, and from here on at once.
    public func endHoldingOutput() { serial.endHolding() }
}
