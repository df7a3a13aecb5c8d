import Glibc
import Host
import QMP
import TestSupport

/// A fault about to happen to two processes.
struct Blow: Sendable {
    private let fault: Fault
    private let source: ChildProcess
    private let destination: ChildProcess
    private let sourceMonitor: QMPClient

    init(_ fault: Fault, source: VM, destination: VM) {
        self.fault = fault
        self.source = source.process
        self.destination = destination.process
        sourceMonitor = source.client
    }

    /// Where the proxy strikes by itself.
    var point: FaultyProxy.Point {
        guard case .byte(let point, _) = fault.moment else { return .never }
        return point
    }

    /// For moments that no byte marks: waits, and strikes. A migration that is over meanwhile is not struck.
    func waitForMoment(_ proxy: FaultyProxy) throws {
        guard case .afterStop(let nanoseconds) = fault.moment else { return }
        try sourceMonitor.waitForEvent("STOP", deadline: .after(seconds: 20))
        Clock.sleep(nanoseconds: nanoseconds)
        proxy.strikeNow()
    }

    /// On the thread that passes the bytes.
    func deliver(through proxy: FaultyProxy) {
        if case .byte(_, let delay) = fault.moment, delay > 0 { Clock.sleep(nanoseconds: delay) }
        switch fault.blow {
        case .killSource: source.signal(SIGKILL)
        case .killDestination: destination.signal(SIGKILL)
        case .cut: proxy.cut()
        case .holdAndCancel:
            proxy.hold()
            Clock.sleep(nanoseconds: 20_000_000)
            // Too late for it, once the destination may start: then only the stall's end by a cut remains.
            _ = try? sourceMonitor.execute("migrate_cancel")
            proxy.cut()
        case .holdAndGoOn:
            proxy.hold()
            Clock.sleep(nanoseconds: 100_000_000)
            proxy.release()
        }
    }
}
