import Host
import TestSupport
import Testing

@Suite("Idle processors that are kept awake", .serialized, .enabled(if: mayKeepAwake, needsAwake))
struct AwakeProcessorsTests {
    @Test("the kernel is asked for no delay, as long as one lives, and no longer")
    func asked() throws {
        let before = try wakeUpLimit()
        do {
            let awake = try AwakeProcessors()
            let second = try AwakeProcessors()
            #expect(try wakeUpLimit() == 0)
            extendLifetime(awake)
            extendLifetime(second)
        }
        #expect(try wakeUpLimit() == before)
        #expect(before > 0, "somebody else keeps this host awake: the test says nothing")
    }
}
