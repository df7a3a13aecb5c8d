import Host
import Synchronization
import Testing

@testable import QMP

@Suite(.timeLimit(.minutes(10))) struct QMPClientTests {
    @Test("threads sharing a client each get the reply to their own command")
    func sharing() throws {
        let vm = try Monitored()
        let client = try QMPClient(path: vm.path)
        let wrong = Atomic(0)
        let threads = try (0..<4).map { number in
            try HostThread(name: "caller-\(number)") {
                for turn in 0..<50 {
                    let value = JSON(number * 1000 + turn)
                    if (try? client.execute("echo", ["value": value])) != value { wrong.add(1, ordering: .relaxed) }
                }
            }
        }
        threads.forEach { $0.join() }
        #expect(wrong.load(ordering: .relaxed) == 0)
    }

    @Test("an out-of-band call returns while another thread waits for a blocked command")
    func outOfBand() throws {
        let vm = try Monitored()
        let client = try QMPClient(path: vm.path)
        let result = Mutex<JSON?>(nil)
        let waiter = try HostThread(name: "waiter") {
            let value = try? client.execute("block")
            result.withLock { $0 = value }
        }
        vm.waitUntilBlocked()
        #expect(try client.execute("quick", outOfBand: true) == true)
        vm.open()
        waiter.join()
        #expect(result.withLock { $0 } == "done")
    }

    @Test("a refusal carries the class and the sentence")
    func refusal() throws {
        let vm = try Monitored([
            Command("device_del") { _ in throw QMPError("Device 'a' not found", class: .deviceNotFound) }
        ])
        let client = try QMPClient(path: vm.path)
        #expect(throws: QMPClientError.refused(QMPError("Device 'a' not found", class: .deviceNotFound))) {
            try client.execute("device_del")
        }
    }

    @Test("a reply that does not come in time is an error, and the next command gets its own reply")
    func deadline() throws {
        let vm = try Monitored()
        let client = try QMPClient(path: vm.path)
        let error = #expect(throws: QMPClientError.self) {
            try client.execute("block", deadline: .after(milliseconds: 50))
        }
        guard case .timedOut = error else { return #expect(Bool(false), "\(String(describing: error))") }
        vm.open()
        #expect(try client.execute("echo", ["value": 5]) == 5)
    }

    @Test("an event is found by name and data; those of other names stay for who waits for them")
    func events() throws {
        let vm = try Monitored()
        let client = try QMPClient(path: vm.path)
        for (name, status) in [("MIGRATION", "setup"), ("STOP", ""), ("MIGRATION", "completed")] {
            vm.server.post(name, data: ["status": .string(status)])
        }
        let event = try client.waitForEvent("MIGRATION", deadline: .after(seconds: 5)) { $0["status"] == "completed" }
        #expect(event.data == ["status": "completed"])
        try client.waitForEvent("STOP", deadline: .after(seconds: 5))
        #expect(client.takeEvents() == [])
        let error = #expect(throws: QMPClientError.self) {
            try client.waitForEvent("RESUME", deadline: .after(milliseconds: 20))
        }
        guard case .timedOut = error else { return #expect(Bool(false), "\(String(describing: error))") }
    }

    @Test("calls that wait fail with a sentence when the VM goes away")
    func vanishing() throws {
        let vm = try Monitored()
        let client = try QMPClient(path: vm.path)
        let stopper = try HostThread(name: "stopper") {
            vm.waitUntilBlocked()
            vm.server.stop(deadline: .after(milliseconds: 50))
        }
        let error = #expect(throws: QMPClientError.self) { try client.execute("block") }
        #expect(error?.description == "wait for the reply to block of \(vm.path): the VM closed the connection")
        vm.open()
        stopper.join()
    }
}
