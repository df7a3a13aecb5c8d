public import MigrationStream

/// A page that is not here as the source sent it.
struct PageFinding: Hashable, Sendable {
    enum Kind: Hashable, Sendable {
        /// Its contents do not fit their digest.
        case damaged
        /// Zeros came instead of its contents.
        case zeroed
        /// What it was before came again.
        case stale
        /// The contents of another page came.
        case swapped(block: Int, page: UInt64)
        /// The source sent it, and nothing came.
        case dropped
        /// Its latest contents did not come, or older ones came after them.
        case outdated
        /// It came, and the source did not send it.
        case uncalledFor
    }

    let block: Int
    let page: UInt64
    let kind: Kind

    /// In a list of pages: the block, the offset, and what is known.
    func words(_ names: [String]) -> String {
        let place = "\(names[block]) 0x\(String(page * 4096, radix: 16))"
        return switch kind {
        case .damaged: "\(place) (contents do not fit their digest)"
        case .zeroed: "\(place) (zeros came instead)"
        case .stale: "\(place) (stale: it came as it was before)"
        case .swapped(let block, let page):
            "\(place) (swapped: it came with the contents of \(names[block]) 0x\(String(page * 4096, radix: 16)))"
        case .dropped: "\(place) (dropped: it never came)"
        case .outdated: "\(place) (stale or dropped: what was sent last is not what came last)"
        case .uncalledFor: "\(place) (it came and was not sent)"
        }
    }
}

/// What the comparison of both sides' records came to.
public enum RootVerdict: Hashable, Sendable {
    case same
    /// They differ: the source is to tell these digests.
    case ask(DigestRange)
    /// One sentence that names the pages.
    case corrupt(String)
}
