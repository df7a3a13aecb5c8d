/// By which rule the right to run the guest passes from the source to the destination.
public enum HandoverRule: String, Sendable {
    /// PREPARE, READY, COMMIT, STARTED: between two Godwits. The destination starts on COMMIT only, and the source gives
    /// up the guest before it says so; at no instant may both run it.
    case twoPhase = "two-phase"
    /// With a QEMU peer: the destination starts when the whole stream has arrived, and acknowledges with SHUT. A source
    /// that hears of a failure or loses the connection before that resumes the guest, as QEMU does.
    case qemu
    /// `exec:`, `file:` and other transports that cannot answer: what was handed over whole is theirs.
    case oneWay = "one-way"
}
