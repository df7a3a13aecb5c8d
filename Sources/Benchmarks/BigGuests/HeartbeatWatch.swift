import CommandLineKit
import Host
import Synchronization

/// Listens to the serial lines of both ends of a migration: the time from the last heartbeat here to the first there is what somebody who
/// talks to the guest waits, whoever runs it and whatever it reports.
final class HeartbeatWatch: Sendable {
    private struct State {
        var lastAtSource: UInt64?
        var firstAtDestination: UInt64?
    }

    private let state = Monitor(State())
    private let wake: EventDescriptor
    private let thread = Mutex<HostThread?>(nil)

    /// Connects to both lines, which are there before the machines are. - Throws: `CommandFailure` if one is not within 20 s.
    init(source: String, destination: String) throws {
        wake = try EventDescriptor()
        let lines = [try Self.connect(source), try Self.connect(destination)]
        let thread = try HostThread(name: "heartbeats") { [self] in watch(lines) }
        self.thread.withLock { $0 = thread }
    }

    private static func connect(_ path: String) throws -> Descriptor {
        let deadline = Deadline.after(seconds: 20)
        while true {
            do throws(SystemError) { return try Socket.connect(unix: path) } catch {
                guard !deadline.hasPassed else { throw CommandFailure("a serial line: \(error)") }
                Clock.sleep(nanoseconds: 2_000_000)
            }
        }
    }

    private func watch(_ lines: [Descriptor]) {
        _ = HostThread.runBeforeOthers()
        var open = lines.map(Optional.some)
        while true {
            let wanted = open.compactMap(\.self).map { ($0, Readiness.readable) } + [(wake.descriptor, .readable)]
            // Whatever goes wrong here, and with a line below, ends in no heartbeat at the destination: `gapMilliseconds` fails.
            guard let ready = try? poll(wanted) else { return }
            let now = Clock.monotonicNanoseconds
            if ready.last?.isEmpty == false { return }
            var place = 0
            for index in open.indices {
                guard let line = open[index] else { continue }
                defer { place += 1 }
                guard !ready[place].isEmpty else { continue }
                let bytes = (try? Socket.receive(line, upTo: 4096))?.bytes ?? []
                if bytes.isEmpty {
                    open[index] = nil
                } else {
                    note(index, now)
                }
            }
        }
    }

    private func note(_ index: Int, _ now: UInt64) {
        state.withLock { state in
            if index == 0 {
                state.lastAtSource = now
            } else {
                state.firstAtDestination = state.firstAtDestination ?? now
            }
        }
    }

    /// Waits for the first heartbeat there. - Returns: the gap in milliseconds.
    /// - Throws: `CommandFailure` if it does not come within 10 s, and if the two lines were read too late to tell which was first: that
    ///   is no gap of nothing.
    func gapMilliseconds() throws(CommandFailure) -> Double {
        let ends = state.wait(deadline: .after(seconds: 10)) { state in
            state.firstAtDestination.map { (last: state.lastAtSource, first: $0) }
        }
        guard let ends else { throw CommandFailure("no heartbeat of the guest at the destination within 10 s") }
        guard let last = ends.last else { throw CommandFailure("no heartbeat of the guest at the source") }
        guard last < ends.first else {
            throw CommandFailure(
                "the last heartbeat of the source was not read before the first of the destination: the gap is not known"
            )
        }
        return Double(ends.first - last) / 1e6
    }

    func end() {
        wake.raise()
        thread.withLock { $0.take() }?.join()
    }
}
