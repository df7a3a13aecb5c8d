import GuestMemory
import MigrationStream
import Synchronization

/// What will be asked for next, by ``AccessStreams``: threads that answer requests tell of them, the thread that sends the rest takes
/// from here first.
///
/// A destination that takes whole pages of its memory gets such pages: they are what steps are counted in, then.
final class Prefetch: Sendable {
    private let streams = Mutex(AccessStreams())
    private let on: Atomic<Bool>

    /// So much goes ahead of a stream at most; a page of the destination's memory may be more. It must be worth the time that what is sent waits
    /// in sockets: with less a fast guest asks for each page before it comes.
    private static let mostPages: UInt64 = 512

    init(isOn: Bool = true) { on = Atomic(isOn) }

    /// Any thread may change it. What was asked for meanwhile is not forgotten.
    var isOn: Bool {
        get { on.load(ordering: .relaxed) }
        set { on.store(newValue, ordering: .relaxed) }
    }

    /// A page was asked for; best told when it is on its way.
    func asked(_ request: PageRequest, of pages: OutgoingPages) {
        guard let place = pages.place(of: request) else { return }
        let size = pages.pagesTogether(of: place.block)
        let most = Int(max(1, Self.mostPages / size))
        streams.withLock {
            $0.asked(place.page.value / size, of: place.block, most: most) { page in
                pages.isLeft(PageIndex(UInt64(page) * size), of: place.block)
            }
        }
    }

    /// Takes what comes next out of what is left: of one block, at most `limit` pages, or one page of the destination's memory.
    func take(from pages: OutgoingPages, limit: Int) -> [OutgoingPages.Piece] {
        guard isOn else { return [] }
        var pieces: [OutgoingPages.Piece] = []
        streams.withLock { streams in
            streams.takeNext { block in
                let size = pages.pagesTogether(of: block)
                return (pages.pageCount(of: block) / size, size > 1 ? 1 : limit)
            } take: { page, block in
                guard let piece = pages.take(PageIndex(page * pages.pagesTogether(of: block)), of: block) else {
                    return false
                }
                pieces.append(piece)
                return true
            }
        }
        return OutgoingPages.Piece.joined(pieces)
    }

    /// Another connection, or another attempt: what was asked for before says nothing about it.
    func forget() { streams.withLock { $0 = AccessStreams() } }
}

extension OutgoingPages.Piece {
    /// Pages side by side become one piece, whichever of them was first.
    static func joined(_ pieces: [Self]) -> [Self] {
        var joined: [Self] = []
        for piece in pieces {
            guard let last = joined.last, last.block == piece.block, last.isHole == piece.isHole,
                last.pages.upperBound == piece.pages.lowerBound || piece.pages.upperBound == last.pages.lowerBound
            else {
                joined.append(piece)
                continue
            }
            joined[joined.count - 1] = Self(
                block: last.block,
                pages: min(
                    last.pages.lowerBound, piece.pages.lowerBound)..<max(
                        last.pages.upperBound, piece.pages.upperBound), isHole: last.isHole)
        }
        return joined
    }
}
