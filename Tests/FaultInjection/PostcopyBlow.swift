import Glibc
import Host
import QMP
import TestSupport

/// What is done to a migration whose guest moves before its memory, and when. Drawn from the seed.
struct PostcopyBlow: Sendable, CustomStringConvertible {
    enum Kind: String, Sendable, CaseIterable {
        case cutAll = "all connections are cut"
        case cutOne = "one connection is cut"
        case halfCloseToDestination = "a connection is half closed, the destination hears of it"
        case halfCloseToSource = "a connection is half closed, the source hears of it"
        case stallAll = "all connections stall, an operator pauses"
        case stallOne = "one connection stalls, an operator pauses"
        case pauseSource = "the source's operator pauses"
        case pauseDestination = "the destination's operator pauses"
        case killSource = "the source is killed"
        case killDestination = "the destination is killed"

        var kills: Bool { self == .killSource || self == .killDestination }
    }

    enum Moment: Sendable, CustomStringConvertible {
        /// So long after the guest was told to move.
        case time(nanoseconds: UInt64)
        /// After so many bytes of the first connection.
        case byte(Int)

        var description: String {
            switch self {
            case .time(let nanoseconds): "\(nanoseconds / 1000) us after the guest was told to move"
            case .byte(let count): "after \(count) bytes to the destination"
            }
        }
    }

    let kind: Kind
    let moment: Moment
    /// Which of the connections there are.
    let number: Int

    var description: String { "\(kind.rawValue), \(moment)" }

    init(_ random: inout SeededRandom, kinds: [Kind], byteLimit: Int, nanosecondLimit: UInt64) {
        kind = kinds.randomElement(using: &random) ?? .cutAll
        // A byte is hit exactly; what an operator does is not.
        let aims = [.cutAll, .cutOne, .killSource, .killDestination].contains(kind) && Bool.random(using: &random)
        moment =
            aims
            ? .byte(.random(in: 0...byteLimit, using: &random))
            : .time(nanoseconds: .random(in: 0...nanosecondLimit, using: &random))
        number = .random(in: 0..<16, using: &random)
    }

    /// Where the proxy strikes by itself.
    var point: FaultyProxy.Point {
        if case .byte(let count) = moment { .forward(count) } else { .never }
    }

    func deliver(
        _ proxy: FaultyProxy, source: ChildProcess, destination: ChildProcess, _ monitors: (QMPClient, QMPClient)
    ) {
        let connections = proxy.connections
        let one = connections.isEmpty ? 0 : connections[number % connections.count]
        func pause(_ monitor: QMPClient) { _ = try? monitor.execute("migrate-pause", outOfBand: true) }
        switch kind {
        case .cutAll: proxy.cut()
        case .cutOne: proxy.cut(connection: one)
        case .halfCloseToDestination: proxy.halfClose(connection: one, towardsDestination: true)
        case .halfCloseToSource: proxy.halfClose(connection: one, towardsDestination: false)
        case .stallAll: proxy.hold()
        case .stallOne: proxy.hold(connection: one)
        case .pauseSource: pause(monitors.0)
        case .pauseDestination: pause(monitors.1)
        case .killSource: source.signal(SIGKILL)
        case .killDestination: destination.signal(SIGKILL)
        }
    }
}
