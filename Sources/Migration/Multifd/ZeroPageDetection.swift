/// Who looks for pages of zeros, and where they are told (`zero-page-detection`, by QEMU's names).
public enum ZeroPageDetection: String, Sendable, CaseIterable {
    /// Nobody: every page is sent whole.
    case none
    /// They are told on the main channel, which every QEMU understands. The thread that would send a page looks, here as with `multifd`.
    case legacy
    /// They are told in the packets of the other channels: QEMU 9.0 and newer, Godwit. An older QEMU would miss them without a word.
    case multifd
}
