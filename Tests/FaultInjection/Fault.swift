import Host
import TestSupport

/// What is done to a migration, and when. Drawn from the seed: the same seed strikes the same way.
struct Fault: Sendable, CustomStringConvertible {
    enum Blow: String, Sendable, CaseIterable {
        case killSource = "the source is killed"
        case killDestination = "the destination is killed"
        case cut = "the connection is cut"
        case holdAndCancel = "the connection stalls and the operator cancels"
        case holdAndGoOn = "the connection stalls for a while"
    }

    /// When it strikes.
    enum Moment: Sendable, CustomStringConvertible {
        /// At a byte, or so many nanoseconds after it.
        case byte(FaultyProxy.Point, delayNanoseconds: UInt64)
        /// So many nanoseconds after the guest was stopped for the switch.
        case afterStop(nanoseconds: UInt64)

        var description: String {
            switch self {
            case .byte(let point, 0): "\(point)"
            case .byte(let point, let delay): "\(delay / 1000) us after that: \(point)"
            case .afterStop(let delay): "\(delay / 1000) us after the guest was stopped"
            }
        }
    }

    let blow: Blow
    let moment: Moment
    /// The destination was told where to listen by a command, and stays to be asked when it fails.
    let isDeferred: Bool

    var description: String { "\(blow.rawValue), \(moment)\(isDeferred ? ", deferred" : "")" }

    /// What passes in an undisturbed migration of the guest.
    struct Traffic: Sendable {
        var forward: Int
        var backward: Int
        /// HELLO and PONG: what the destination says before it says READY.
        var greeting: Int
        /// PREPARE has been said when this much is left to be sent.
        var afterReady: Int
    }

    init(_ random: inout SeededRandom, traffic: Traffic) {
        // Killing and cutting are the rule.
        blow =
            [
                .killSource, .killDestination, .cut, .cut, .killSource, .killDestination, .cut, .holdAndCancel, .cut,
                .holdAndGoOn,
            ]
            .randomElement(using: &random) ?? .cut
        let delay = blow == .cut || Bool.random(using: &random) ? 0 : UInt64.random(in: 0...3_000_000, using: &random)
        switch Int.random(in: 0..<10, using: &random) {
        case 0..<4: moment = .byte(.forward(.random(in: 0...traffic.forward, using: &random)), delayNanoseconds: delay)
        case 4..<7:
            moment = .byte(.backward(.random(in: 0...traffic.backward, using: &random)), delayNanoseconds: delay)
        case 7..<9:
            let bytes = Int.random(in: 0...traffic.afterReady, using: &random)
            moment = .byte(.forwardAfter(backward: traffic.greeting + 1, forward: bytes), delayNanoseconds: delay)
        default: moment = .afterStop(nanoseconds: .random(in: 0...8_000_000, using: &random))
        }
        isDeferred = Bool.random(using: &random)
    }
}
