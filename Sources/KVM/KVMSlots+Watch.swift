public import Accelerator
public import GuestMemory
import Host
import Synchronization

extension KVMSlots {
    /// Tells a watch what the windows show now and, until another is set, whatever changes there.
    func watchWindows(_ watch: (any WindowWatch)?) throws(AcceleratorError) {
        try changing.withLock { (_) throws(AcceleratorError) in
            windows.setWatch(watch)
            guard let watch else { return }
            for slot in slots where slot.isWindow {
                for part in slot.shown {
                    do throws(SystemError) { try watch.shows(windows.window(part.pages, part.content)) } catch {
                        throw AcceleratorError(error.description)
                    }
                }
            }
        }
    }
}

extension KVMAccelerator {
    public func watchWindows(_ watch: (any WindowWatch)?) throws(AcceleratorError) { try slots.watchWindows(watch) }
}
